"""`beats-ray bench NAME`: how fast the parts are, beside what a user would run instead, measured in one run.

    beats-ray bench encoder                          # one training step of the base encoder
    beats-ray bench fbank clips=64 threads=1
    beats-ray bench pretrain --json

On a CPU every case runs in a process of its own, so that its peak memory is its own; the cases take turns for several
rounds, so that a busy machine slows all of them alike. Ratios within one run mean something on a shared machine, times
do not.
"""
