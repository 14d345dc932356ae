"""What a run is: the recipe's schema, the plan of its stages, the run folder, and the command line."""
