"""The smallest run that trains, for the end-to-end tests: four blocks, 100 of scikit-learn's digits."""

TINY = {
    "name": "tiny",
    "data": {"source": "digits", "val_size": 100, "max_train": 200, "max_test": 100},
    "model": {"name": "resnet18", "stem": "cifar", "kwargs": {"layers": [1] * 4, "channels": [4, 4, 8, 8]}},
    "threat": {"eps": 0.1},
    "objective": {"num_steps": 2, "step_size": 0.06},
    "train": {"epochs": 1, "batch_size": 50, "device": "cpu"},
    "evaluation": {"train_size": 50, "num_steps": 2, "step_size": 0.06},
    "tracking": {"wandb": "disabled"},
}
