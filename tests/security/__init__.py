"""No one gets in who may not, and no one takes more than a share."""
