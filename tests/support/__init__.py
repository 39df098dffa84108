"""What tests of several subjects share: small runs, what came of them, corpora, damage, commands."""
