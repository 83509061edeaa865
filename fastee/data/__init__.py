"""What the demo and the tests run on without a download: a sample of Fashion-MNIST and a small network trained for it."""

from fastee.data.demo import demo_metadata, demo_network
from fastee.data.sample import classes, load, normalisation, splits

__all__ = ["classes", "demo_metadata", "demo_network", "load", "normalisation", "splits"]
