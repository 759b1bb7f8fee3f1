"""What is monitored: quantities measured on a trained model, each with its error."""

from wcitrain.measures.measuring import ESTIMATORS, measure_wci
from wcitrain.measures.pac_bayes import PACBayesBound, pac_bayes_bound
from wcitrain.measures.wci import WCIMeasurement

__all__ = ["ESTIMATORS", "PACBayesBound", "WCIMeasurement", "measure_wci", "pac_bayes_bound"]
