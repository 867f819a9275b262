"""Recipes that fetch or build the sample models; weights never go into git."""
