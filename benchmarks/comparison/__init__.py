"""What the commands of the comparison share: problems, checks, targets, tables."""
