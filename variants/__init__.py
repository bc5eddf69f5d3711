"""Our own forks of DAWM, one file each: python -m variants.joint_td3bc."""
