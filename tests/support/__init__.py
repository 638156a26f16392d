"""What several tests share: stand-ins, layers in pairs, the side-by-side interpreter."""
