"""Ray Serve applications: HTTP schemas and routes, authentication, limits, the Predictor replica and the Personalizer.

Routes are thin: they parse, call a service and shape the answer; the services below them know no HTTP.
"""
