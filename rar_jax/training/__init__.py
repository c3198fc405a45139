"""Learning: the loop, the step, the objective, the recipe, the guard, and evaluation while training."""
