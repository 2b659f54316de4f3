"""How the book's pages are made; nothing in here changes a number in them."""
