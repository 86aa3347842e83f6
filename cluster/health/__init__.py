"""What ``lipflow doctor`` looks at: this machine, and the services that the environment names."""
