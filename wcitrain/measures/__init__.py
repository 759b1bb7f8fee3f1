"""What is monitored: quantities measured on a trained model, each with its error."""

from wcitrain.measures.wci import WCIMeasurement

__all__ = ["WCIMeasurement"]
