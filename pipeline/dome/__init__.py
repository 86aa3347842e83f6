"""The synthetic dome: face assets, their appearance and motion, rigs, and the capture that is written of them."""
