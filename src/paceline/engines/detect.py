async def detect(session, url, key): return None
