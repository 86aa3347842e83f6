"""Readers of captures, a layout each, and the file formats that layouts are made of."""
