"""How the models are made that the package carries and the tests fetch; no module of the package imports this."""
