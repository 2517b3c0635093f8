"""What is or may be wrong with the points of a sweep: rules, each a pure function of numbers, and what applies them."""
