"""Recipes: each module has `recipe(config)`, which returns the steps a pair goes through, in order."""
