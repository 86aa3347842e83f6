"""The networks: encoder, decoder, colour correction, drivers and flow, composed in ``avatar``."""
