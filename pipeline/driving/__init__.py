"""Driving signals of captures: headset views, a frontal image, keypoints; rendered where a capture lacks them."""
