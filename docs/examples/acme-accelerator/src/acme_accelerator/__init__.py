"""Drivetrain on the Acme One: a platform, an attention backend and a quantizer.

The Acme One does not exist. It is played by this machine's processor, with a memory of its own that is counted and
limited, so that everything a vendor's package has to do can be read, run and tested without any hardware.
"""
