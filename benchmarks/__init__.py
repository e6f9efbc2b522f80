"""The benchmark suite: reference, compiled, dense limit and ours, side by side and recorded.

Installed as `dwm_fast._bench`, all but `dev`. Run from a checkout (`python -m benchmarks.dev.run`) it measures that
checkout, whatever else is installed.
"""

if __name__ == "benchmarks":
    from benchmarks.dev.checkout import use_checkout

    use_checkout()
