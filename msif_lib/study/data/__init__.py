"""The data sets of the study: images, texts, and tasks cut out of them."""
