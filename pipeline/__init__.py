"""ESRGAN x4 super-resolution as a training pipeline on Ray."""

__version__ = "0.1.0"
