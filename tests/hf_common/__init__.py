"""The library's own tests of models, configs and processors, run on ours."""
