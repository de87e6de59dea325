"""The backend in Triton: ops of the namespace `bioplaus_triton`, which torch.compile sees through.

Checked by interpreter, not yet on hardware.
"""
