"""What ``wcitrain export`` writes: a trained model in a folder that others load without us.

``folder`` has the files that are loaded, ``card`` what is said of the model, ``hub`` their way to a hub.
"""

from wcitrain.export.folder import export_model
from wcitrain.export.hub import check_hub, push
