"""Image and array codecs."""
