"""The pages of the health and of the control address, and who gets them."""
