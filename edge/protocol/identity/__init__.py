"""Who somebody is: keys, credentials, what is signed with them, and the clock that they are judged by."""
