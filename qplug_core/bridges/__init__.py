"""Thin bridges into engines that people already use."""
