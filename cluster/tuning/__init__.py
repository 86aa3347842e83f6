"""A sweep's parts: the space that it searches, its recipe, its ledger of trials, and what Ray Tune asks of them."""
