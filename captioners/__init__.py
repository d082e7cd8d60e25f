"""Write text: nothing yet; captioners come with the recipes that use them."""
