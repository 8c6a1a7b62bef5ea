"""Measuring generators on photographs, showing the differences, and upscaling with them."""
