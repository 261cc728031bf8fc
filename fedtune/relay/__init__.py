"""Between Flower's one-message ClientApp and the site's long-lived trainer; loads no torch."""
