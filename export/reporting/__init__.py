"""What the report and the comparison are made of."""
