"""Captures: their readers, and the synthetic dome that writes one."""
