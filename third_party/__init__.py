"""What is specific to the upstream packages: pins, licences and the touch points in them."""

if __name__ != "dpm_core.third_party":  # from the top of a checkout: every class would exist twice
    raise ImportError(f"import dpm_core.third_party, not {__name__}", name=__name__)
