"""One rank's copies between the cache and the tier of host memory and disk below it."""
