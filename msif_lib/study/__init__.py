"""What only the notebooks need: data sets, models, training, figures and result records."""
