"""What training workers run: the loop, its objective, and the trained avatar that drivers are added to."""
