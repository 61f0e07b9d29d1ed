from .meter import Meter
