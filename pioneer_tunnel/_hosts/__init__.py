"""What the faces for asyncio and for threads share."""
