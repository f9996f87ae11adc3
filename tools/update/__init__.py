"""How a board takes releases: it fetches, tries, and goes back where what it took does not come up."""
