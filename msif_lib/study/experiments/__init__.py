"""What the experiments of the study do."""
