"""What every room uses and nothing of vss is used by: errors, files, registry, recipe, report, environment."""
