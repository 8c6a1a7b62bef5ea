"""Evaluation, upscaling and export of generators."""
