"""The pages, one module each; the app imports a page when it is first opened."""
