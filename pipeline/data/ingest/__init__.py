"""From image files to a data set: sources, decoding, patch extraction, writing."""
