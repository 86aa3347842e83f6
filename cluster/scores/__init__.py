"""What evaluations, fits and samplings compute: tasks that score frames, sheets of scores, and tables of them."""
