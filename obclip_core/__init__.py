"""Oblivious cloud-device hybrid image generation, module by module as the paper is written."""
